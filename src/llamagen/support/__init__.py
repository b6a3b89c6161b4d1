"""Small things that every room uses: errors, storage, devices, processes, pictures, class names."""
