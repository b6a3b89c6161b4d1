"""The autoregressive model over image codes."""

from llamagen.models.transformer.conditioning import ClassCondition as ClassCondition
from llamagen.models.transformer.conditioning import TextCondition as TextCondition
from llamagen.models.transformer.kv_cache import KVCache as KVCache
from llamagen.models.transformer.model import Transformer as Transformer
from llamagen.models.transformer.rope import apply_rope as apply_rope
from llamagen.models.transformer.rope import rope_table as rope_table
from llamagen.models.transformer.tokens import NO_CELL as NO_CELL
from llamagen.models.transformer.tokens import Tokens as Tokens
