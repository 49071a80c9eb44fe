"""Whole-body poses: the keypoint layout, OpenPose JSON, drawing, extraction.

Layer 1: leaves; import what is needed from the modules.
"""
