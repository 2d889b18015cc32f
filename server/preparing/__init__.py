"""From the body of a request to token ids, where that holds up nobody."""
