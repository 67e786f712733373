"""What the library costs on a machine."""
