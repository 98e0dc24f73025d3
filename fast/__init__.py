"""The same numbers sooner: everything in this folder can be deleted, and the project works without it, slower."""
