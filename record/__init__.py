"""The folder of a run: whole files, checksums, the options and versions behind a result, and whose files are in it."""
