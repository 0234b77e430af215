"""A byte-level GPT, trained with FSDP2: `train.py` with ckptd, `control.py` without."""
