"""Operators for sparse methods: exact magnitude thresholds, masks, supports, masked linear layers."""
