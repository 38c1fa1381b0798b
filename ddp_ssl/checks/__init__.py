"""The checks of `ddp-ssl doctor`, a file per subject."""
