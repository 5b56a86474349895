"""Running, tabling and drawing comparisons."""
