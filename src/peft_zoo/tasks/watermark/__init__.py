"""Watermarks in the images of an autoencoder: keys, decoders, training, verification, export."""
