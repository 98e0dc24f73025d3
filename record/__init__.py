"""What keeps a run whole: options, files and checksums, signals, memory, and the search for what is not finite."""
