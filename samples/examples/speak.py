"""Speech from text, written piece by piece while it is still being decoded."""

import soundfile

import polyspec

pipe = polyspec.pipeline("speech")
with soundfile.SoundFile("hello.wav", "w", samplerate=pipe.sample_rate, channels=1) as file:
    for chunk in pipe.stream("Good morning. How are you today?", seed=0):
        file.write(chunk.waveform[0].float().numpy())
        print(f"{file.frames / file.samplerate:.1f} s of sound")
