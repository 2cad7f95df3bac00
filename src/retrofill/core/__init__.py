"""What an event does to a person: values in, values out. No file, socket, clock or random number."""
