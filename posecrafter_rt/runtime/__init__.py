"""What runs an engine: preparation, the denoising loop, and the inversion cache.

Layer 5: knows networks by name only, and no backend.
"""
