"""Functions on tensors: differentiable, safe under torch.compile, on CPU and CUDA."""

from .diffusion import diffusion_step
from .diffusion_plan import DiffusionPlan
from .ema import ema_update_
from .gmm import GmmArguments, gmm_log_prob
from .gmm_em import GMM_EM_ROWS, GmmParameters, GmmStatistics, gmm_em_statistics, gmm_m_step, gmm_responsibilities
from .gmm_features import gmm_condition, gmm_impute, gmm_marginal
from .gmm_fit import GmmFit, gmm_fit
from .gmm_inference import gmm_posterior_mean, gmm_sample, gmm_score
from .kmeans import KMeansResult, kmeans, kmeans_plus_plus
from .likelihood import discretized_logistic_mixture_nll, discretized_logistic_mixture_sample
from .likelihood_elements import bernoulli_nll, categorical_nll, discretized_logistic_nll, gaussian_nll
from .masked_conv import masked_conv2d
from .noising import add_noise, denoising_loss, flow_pair
from .pixelcnn import PixelCNNWeights, pixelcnn_sample
from .random import philox_normal, philox_uniform

__all__ = [
    "DiffusionPlan",
    "GMM_EM_ROWS",
    "GmmArguments",
    "GmmFit",
    "GmmParameters",
    "GmmStatistics",
    "KMeansResult",
    "PixelCNNWeights",
    "add_noise",
    "bernoulli_nll",
    "categorical_nll",
    "denoising_loss",
    "diffusion_step",
    "discretized_logistic_mixture_nll",
    "discretized_logistic_mixture_sample",
    "discretized_logistic_nll",
    "ema_update_",
    "flow_pair",
    "gaussian_nll",
    "gmm_condition",
    "gmm_em_statistics",
    "gmm_impute",
    "gmm_fit",
    "gmm_log_prob",
    "gmm_m_step",
    "gmm_marginal",
    "gmm_posterior_mean",
    "gmm_responsibilities",
    "gmm_sample",
    "gmm_score",
    "kmeans",
    "kmeans_plus_plus",
    "masked_conv2d",
    "philox_normal",
    "philox_uniform",
    "pixelcnn_sample",
]
