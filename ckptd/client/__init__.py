"""What runs in the trainer: attach, capture, resume.

Start reading at `run.py`.  `state.py` says what a rank's state is made of,
`capture.py` how it is copied at the cut and behind the fence, `restore.py` how it
comes back, `schedule.py` what is due, `link.py` how the daemon is spoken to.
"""
