"""The commands `ckptd` (and, later, `ckpt-convert`)."""
