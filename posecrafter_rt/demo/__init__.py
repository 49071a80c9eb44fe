"""The demonstration: the whole path on real footage, measured."""
