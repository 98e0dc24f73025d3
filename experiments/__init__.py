"""What a person runs: fine-tune, distil, evaluate, compare, sweep, repeat, generate."""
