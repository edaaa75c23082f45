package ai.onnxruntime;

import java.nio.FloatBuffer;

/** Holds what it was given: the rest of the buffer, as the runtime copies it, and its shape. */
public class OnnxTensor extends OnnxTensorLike {
  public final float[] values;
  public final long[] shape;

  private OnnxTensor(float[] values, long[] shape) {
    this.values = values;
    this.shape = shape;
  }

  public static OnnxTensor createTensor(OrtEnvironment env, FloatBuffer data, long[] shape) throws OrtException {
    float[] values = new float[data.remaining()];
    data.duplicate().get(values);
    return new OnnxTensor(values, shape);
  }

  @Override
  public Object getValue() throws OrtException {
    return new float[][] {values};
  }

  @Override
  public void close() {}
}
