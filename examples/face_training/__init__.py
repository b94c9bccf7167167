"""What examples/train_faces.py is made of."""
