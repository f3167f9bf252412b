"""Converts LoRAs between the folders of peft and the files of other programs."""
