"""The autoregressive model over image codes."""

from llamagen.models.transformer.blocks import apply_rope as apply_rope
from llamagen.models.transformer.blocks import rope_table as rope_table
from llamagen.models.transformer.conditioning import ClassCondition as ClassCondition
from llamagen.models.transformer.conditioning import TextCondition as TextCondition
from llamagen.models.transformer.inference import NO_CELL as NO_CELL
from llamagen.models.transformer.inference import QUERY as QUERY
from llamagen.models.transformer.inference import KVCache as KVCache
from llamagen.models.transformer.inference import Tokens as Tokens
from llamagen.models.transformer.inference import to_index as to_index
from llamagen.models.transformer.model import Transformer as Transformer
