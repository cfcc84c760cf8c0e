"""The demo that needs no download: everything is made from handwritten digits."""
