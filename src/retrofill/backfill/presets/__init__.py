"""Mappings that come with the program, by name: see `mapping_file.presets`."""
