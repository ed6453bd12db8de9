"""The operations of the recurrent layers: stacking, layout and configuration."""
