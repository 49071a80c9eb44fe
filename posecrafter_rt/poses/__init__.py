"""Whole-body poses: the keypoint layout, OpenPose JSON, drawing, extraction.

Layer 1: leaves; import directly from the modules.
"""
