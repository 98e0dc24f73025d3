"""Every option of a run, with type and default."""
