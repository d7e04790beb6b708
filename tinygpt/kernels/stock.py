"""What tinygrad itself offers for an operation, behind the same signature."""

from tinygpt.kernels.reference import attention_mask


def attention(q, k, v, offset=0, window=None, dropout_p=0.0, dropout_key=None):
    if dropout_p and dropout_key is not None:
        raise ValueError("tinygrad's attention draws its dropout from global state: "
                         "use another implementation, or dropout 0")
    mask = attention_mask(q.shape[2], k.shape[2], offset, window, q.device)
    return q.scaled_dot_product_attention(k, v, attn_mask=mask, enable_gqa=True)
