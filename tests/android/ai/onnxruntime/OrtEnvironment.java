package ai.onnxruntime;

public class OrtEnvironment implements AutoCloseable {
  public static OrtEnvironment getEnvironment() {
    return new OrtEnvironment();
  }

  public OrtSession createSession(byte[] modelArray) throws OrtException {
    return new OrtSession(modelArray);
  }

  @Override
  public void close() {}
}
