"""Watermarks: bits, false positives, image quality, attacks."""
