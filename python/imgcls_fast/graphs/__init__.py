"""ONNX files: read, held against rules, rewritten."""
