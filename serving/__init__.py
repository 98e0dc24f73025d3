"""Adapters in one batch, the service and its page, and files to ship: ONNX, merged checkpoints, model cards."""
