"""What was trained is used: many adapters in one batch, and the service with its page."""
