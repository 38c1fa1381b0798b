"""What `ddp-ssl doctor` looks at, a file per subject."""
