"""Models of their own. Importing this package registers them with the Auto classes of transformers.

The modules themselves register nothing: saved checkpoints carry copies of them.
"""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers.models.auto.modeling_auto import AutoModelForTimeSeriesPrediction

from sa_hf.models.conv_trans import ConvTransConfig
from sa_hf.models.forecasting import ConvTransForForecasting
from sa_hf.models.star_transformer import (
    StarTransformerConfig,
    StarTransformerForSequenceClassification,
    StarTransformerForTokenClassification,
    StarTransformerModel,
)

AutoConfig.register(StarTransformerConfig.model_type, StarTransformerConfig)
StarTransformerConfig.register_for_auto_class()
for _auto, _model in (
    (AutoModel, StarTransformerModel),
    (AutoModelForSequenceClassification, StarTransformerForSequenceClassification),
    (AutoModelForTokenClassification, StarTransformerForTokenClassification),
):
    _auto.register(StarTransformerConfig, _model)
    _model.register_for_auto_class(_auto.__name__)

AutoConfig.register(ConvTransConfig.model_type, ConvTransConfig)
AutoModelForTimeSeriesPrediction.register(ConvTransConfig, ConvTransForForecasting)

__all__ = [
    "ConvTransConfig",
    "ConvTransForForecasting",
    "StarTransformerConfig",
    "StarTransformerForSequenceClassification",
    "StarTransformerForTokenClassification",
    "StarTransformerModel",
]
