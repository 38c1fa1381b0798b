"""Commands that are reached as `ddp-ssl NAME` only, and `common` for all commands."""
