"""What composing LoRAs costs, beside one adapter alone."""
