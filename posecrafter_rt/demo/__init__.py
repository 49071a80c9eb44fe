"""The demonstration: tune, build, render and measure on real footage."""
