"""Layouts of comfy-kitchen's QuantizedTensor: how a quantized weight is stored and undone."""
