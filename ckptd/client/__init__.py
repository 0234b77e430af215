"""What runs in the trainer: attach, capture, resume.

Start reading at `run.py`.  `protection.py` says what happens with a completed step,
`state.py` what a rank's state is made of, `room.py` where there is place for it,
`capture.py` how it is copied at the cut and behind the fence, `outcomes.py` what the
daemon hears of it; `resuming.py` and `restore.py` how it comes back, `link.py` how the
daemon is spoken to.  `saving.py` and `loading.py` are `ckptd.save` and `ckptd.load`.
"""
