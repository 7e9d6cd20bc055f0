"""Reports: JSON documents of what was found, and one HTML page made of them; nothing here needs torch."""
