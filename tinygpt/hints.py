"""Names of settings in other programs, and the flags here that they correspond to."""

# Names that work as flags, in JSON files and in scripts.
ALIASES = {"warmup_steps": "warmup_iters"}

_OURS = {  # a flag, and its names elsewhere
    "learning_rate": "lr peak_lr max_lr base_lr lr_max learningrate step_size",
    "min_lr": "lr_min final_lr end_lr learning_rate_min",
    "warmup_iters": "warmup warm_up num_warmup_steps lr_warmup_steps warmup_iterations",
    "lr_decay_iters": "lr_decay_steps decay_steps decay_iters",
    "schedule": "lr_schedule scheduler lr_scheduler lr_scheduler_type lr_decay_style",
    "batch_size": "batch bs b batchsize micro_batch_size mbs device_batch_size "
                  "per_device_train_batch_size train_batch_size",
    "gradient_accumulation_steps": "grad_accum_steps grad_accum accumulation_steps accum_steps "
                                   "gradient_accumulation accumulate_grad_batches",
    "max_iters": "max_steps steps num_steps iters iterations num_iterations n_steps train_steps "
                 "max_iterations epochs num_epochs n_epochs num_train_epochs",
    "max_minutes": "max_time time_limit max_hours",
    "eval_interval": "eval_every eval_steps eval_freq val_interval val_every save_every save_steps "
                     "save_interval checkpoint_every checkpoint_interval",
    "eval_iters": "eval_batches val_iters val_steps val_batches",
    "log_interval": "log_every logging_steps log_steps print_every",
    "sample_interval": "sample_every",
    "grad_clip": "clip clip_grad gradient_clip gradient_clipping max_grad_norm clip_norm",
    "weight_decay": "wd weightdecay l2",
    "beta1": "adam_beta1 b1", "beta2": "adam_beta2 b2",
    "optimizer": "optim opt optimiser",
    "ema_decay": "ema_rate", "patience": "early_stopping",
    "grad_checkpoint": "gradient_checkpointing activation_checkpointing recompute "
                       "checkpoint_activations",
    "n_layer": "layers num_layers n_layers depth num_hidden_layers nlayer l",
    "n_head": "heads num_heads n_heads num_attention_heads nhead",
    "n_kv_head": "kv_heads num_kv_heads n_kv_heads num_key_value_heads num_query_groups",
    "head_dim": "head_size d_head kv_channels",
    "n_embd": "d_model dim embed_dim emb_dim hidden_size n_embed embedding_dim width model_dim",
    "n_inner": "d_ff ffn_dim intermediate_size mlp_dim hidden_dim ff_dim",
    "block_size": "context context_length context_size ctx ctx_len seq_len seq_length "
                  "sequence_length max_seq_len max_seq_length max_length n_ctx n_positions",
    "position": "pos_encoding pos_embedding pos_emb positional_encoding position_embedding "
                "position_encoding pos pe pos_enc",
    "norm": "norm_type normalization layernorm", "norm_eps": "layer_norm_epsilon eps rms_norm_eps",
    "activation": "act hidden_act activation_function mlp_type",
    "rope_theta": "rope_base theta", "sliding_window": "window window_size attention_window",
    "tie_weights": "weight_tying tied tie_word_embeddings tie_embeddings",
    "qk_norm": "use_qk_norm qk_layernorm",
    "qkv_bias": "attention_bias use_qkv_bias add_qkv_bias", "nope_interval": "no_rope_interval "
    "no_rope_layer_interval", "rope_factor": "rope_scaling_factor",
    "data": "data_path dataset data_dir train_file train_data data_file text_file input_file input "
            "corpus train_path file dataset_name",
    "text_field": "text_column text_key",
    "out_dir": "output_dir output output_path save_dir save_path checkpoint_dir ckpt_dir out "
               "run_dir log_dir logdir",
    "init_from": "pretrained model_name_or_path from_pretrained load finetune base_model "
                 "pretrained_model init",
    "resume": "continue resume_from_checkpoint resume_from restore",
    "keep": "save_total_limit keep_last max_checkpoints",
    "lora_rank": "lora_r lora use_lora", "lora_targets": "target_modules lora_target_modules",
    "eval_only": "evaluate do_eval test_only", "seed": "random_seed rng_seed manual_seed",
    "wandb": "wandb_log use_wandb report_to wandb_project",
    "tensorboard": "tb use_tensorboard",
    "threads": "num_threads cpu_threads n_threads workers num_workers",
    "temperature": "temp t", "top_k": "topk k", "top_p": "topp nucleus p", "min_p": "minp",
    "repetition_penalty": "rep_penalty repeat_penalty penalty",
    "max_new_tokens": "max_tokens length n_tokens num_tokens new_tokens tokens n_predict "
                      "max_length gen_len",
    "num_samples": "n_samples samples n num_return_sequences num_sequences",
    "prompt": "start text input_text message",
    "stop": "stop_string stop_sequence stop_token eos",
    "checkpoint": "ckpt model_path weights model ckpt_path checkpoint_path load model_file",
    "interactive": "chat repl i", "stride": "window_stride", "limit": "max_examples num_examples",
    "task": "tasks benchmark",
}

_WORDS = {  # names that do not correspond to one flag
    "decay_lr": "use --schedule constant for a learning rate that does not decay",
    "no_decay_lr": "use --schedule constant", "nodecay_lr": "use --schedule constant",
    "bpe_vocab_size": "--vocab_size is the size of the vocabulary that --tokenizer bpe trains",
    "mlp": "use --activation swiglu (or gelu, gelu_tanh) and --n_inner",
    "swiglu": "use --activation swiglu", "rmsnorm": "use --norm rmsnorm",
    "rope": "use --position rope", "flash": "use --kernels flash",
    "use_flash": "use --kernels flash", "flash_attention": "use --kernels flash",
    "amp": "use --dtype bfloat16", "bf16": "use --dtype bfloat16", "fp16": "use --dtype float16",
    "mixed_precision": "use --dtype bfloat16", "precision": "use --dtype bfloat16",
    "bfloat16": "use --dtype bfloat16", "half": "use --dtype float16",
    "quantization": "use --quantize int8", "int8": "use --quantize int8",
    "load_in_8bit": "use --quantize int8",
    "compile": "every step is compiled: leave it out",
    "torch_compile": "every step is compiled: leave it out",
    "jit": "every step is compiled: leave it out",
    "kv_cache": "the key-value cache is always used: leave it out",
    "use_cache": "the key-value cache is always used: leave it out",
    "no_kv_cache": "the key-value cache is always used: leave it out",
    "ddp": "use --devices 4, or start it with mpirun -n 4",
    "fsdp": "use --devices 4 and --shard_optimizer",
    "zero": "use --devices 4 and --shard_optimizer",
    "zero_stage": "use --devices 4 and --shard_optimizer",
    "num_gpus": "use --devices 4", "gpus": "use --devices 4", "n_gpus": "use --devices 4",
    "nproc_per_node": "use --devices 4, or start it with mpirun -n 4",
    "gpu": "use --device cuda", "cuda": "use --device cuda", "cpu": "use --device cpu",
    "metal": "use --device metal", "mps": "use --device metal",
    "generate_only": "run generate.py instead", "generate": "run generate.py instead",
    "sample": "run generate.py instead", "sample_only": "run generate.py instead",
    "train": "run train.py instead",
    "prompt_file": "use --prompt FILE:path", "greedy": "use --temperature 0",
    "do_sample": "use --temperature, 0 for the likeliest token",
    "num_beams": "there is no beam search: use --temperature 0",
    "perplexity": "run python -m tinygpt.evaluate instead",
    "char": "use --tokenizer char", "bpe": "use --tokenizer bpe", "byte": "use --tokenizer byte",
    "muon": "use --optimizer muon", "adamw": "use --optimizer adamw",
    "sgd": "use --optimizer adamw",
    "early_stop": "use --patience 5", "save_best": "best.safetensors is always saved",
    "no_bias": "use --bias false",
}

# The hints for each name; a command prints the first whose flags it has.
HINTS: dict[str, list[str]] = {}
for _flag, _names in _OURS.items():
    for _name in _names.split():
        HINTS.setdefault(_name, []).append(f"use --{_flag}")
for _name, _text in _WORDS.items():
    HINTS.setdefault(_name, []).append(_text)
