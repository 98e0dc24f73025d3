"""Adapter files in PEFT's layout, and many adapters over one frozen layer."""
