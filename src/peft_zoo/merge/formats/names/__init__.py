"""Names of the modules of image and video models in diffusers and in the programs that train LoRAs for them."""
