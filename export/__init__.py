"""Networks as ONNX files, and the proof that they compute what PyTorch computes.

Layer 4: imported by `engines` only.
"""
