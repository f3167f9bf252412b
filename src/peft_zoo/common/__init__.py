"""Floor 0 of peft-zoo: small tools without a model or a file format that every other package uses."""
