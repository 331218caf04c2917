"""The preconditioning of Karras et al. 2022, table 1."""


def preconditioning(config, sigma):
    """(c_skip, c_out): the denoised sample is c_skip x + c_out model_output."""
    data = config.sigma_data
    skip = data**2 / (sigma**2 + data**2)
    out = sigma * data / (sigma**2 + data**2) ** 0.5
    if config.prediction_type == "v_prediction":
        return skip, -out
    if config.prediction_type != "epsilon":
        raise ValueError(f"prediction_type must be epsilon or v_prediction, got {config.prediction_type!r}")
    return skip, out


class Preconditioned:
    """The model sees ``c_in x``."""

    def _input_scales(self):
        sigma = self._levels()
        return (1 / (sigma**2 + self.config.sigma_data**2) ** 0.5).tolist()

    def scale_model_input(self, sample, timestep):
        plan = self._ready()
        i = self._scale_index(plan, timestep)
        self.is_scale_input_called = True
        return sample * self._scales(plan)[i]
