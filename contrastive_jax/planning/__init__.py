"""What a step would do on hardware one doesn't own: the hardware, the compiled program, the estimate."""
