"""Calibration: a model's layers one after another, each seen with what comes into it on real text."""
