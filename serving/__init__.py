"""Adapters in one batch, the service and its page, and what ships: ONNX, merged checkpoints, model cards."""
