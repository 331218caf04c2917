"""`torch.nn.Module` twins of the ops."""
