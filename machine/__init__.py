"""Hardware, processes, signals and streams of the machine that runs this."""
