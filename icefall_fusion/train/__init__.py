"""The training loop and the jobs that train acoustic and language models.

Every neural training:

- ``job.py``: processes, threads, result and exit code; the check of exported weights.
- ``loop.py``: the ``Trainer``: limits, validation, checkpoints, resume.
- ``step.py``: one optimizer step: accumulation, bf16, data parallel, clipping.
- ``options.py``: options of the loop and of every training job.
- ``schedule.py``: learning rate by step or by the clock, which ``clock.py`` keeps.
- ``optimizers.py``: AdamW and Muon; ``muon.py``: Muon in few calls. ``ema.py``: averages of the weights.
- ``late_values.py``: figures of a step that are read when the device has them.
- ``checkpoints.py``: training state on disk, averages.
- ``training_log.py``: progress bar, tensorboard, ``log.jsonl``, signals to stop.

The jobs:

- ``acoustic_model.py``: job ``train``, an acoustic model with a CTC, attention or transducer head.
- ``init_weights.py``: the weights that it starts from, and the parts that are not trained.
  ``encoder_cache.py``: frames of an encoder that is not trained, kept on disk.
- ``spelling.py``: whether its pieces spell the text.
- ``acoustic_loss.py``: its losses and error rates. ``curriculum.py``: its first batches, feature statistics.
- ``language_model.py``: job ``train-lm``, a causal language model, or an adapter of one.
- ``lora.py``: the base and the loss of an adapter. ``lora_card.py``: its page. ``lm_documents.py``: its text
  as token streams.
- ``llama.py``: its model, start weights and export. ``token_stream.py``: its batches.
- ``piece_ngram.py``: job ``train-ngram``. ``word_ngram.py``: job ``train-word-ngram``.

To add a training job:

1. Derive its options from ``TrainingOptions``.
2. Write a batch source (``loop.BatchSource``) and a loss function (``step.LossFunction``).
3. Write ``make_trainer(options, device, rank, world)``, which returns a ``Trainer`` of them.
4. Let ``run(options)`` return ``job.run_training(options, make_trainer)``.
5. Enter the job in ``JOBS`` of ``__main__.py``.
"""
